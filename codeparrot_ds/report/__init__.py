"""What a run came to, for a person and for a program."""
