"""``python -m flask_taskworker`` is the ``taskworker`` command."""

from .cli import main

main()
