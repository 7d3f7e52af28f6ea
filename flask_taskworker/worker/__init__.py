"""The engine: reserves messages, runs tasks, settles messages."""
