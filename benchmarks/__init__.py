"""Measures Flask-TaskWorker side by side with other task queues. See README.md."""
