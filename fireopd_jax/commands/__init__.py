"""What a person asks for at the command line: one module a command."""
