"""Output that must follow a JSON schema, a regular expression, a list of choices or a grammar."""
