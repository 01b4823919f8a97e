"""How long a token takes, how short it could be, and where the difference goes."""
