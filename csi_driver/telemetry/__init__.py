"""What an operator sees of the driver while it runs."""
