"""Single experiments that chose defaults or answer one question; each is a command."""
