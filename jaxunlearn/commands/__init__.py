"""What stands behind each subcommand of `jaxunlearn`: its arguments and what it prints."""
