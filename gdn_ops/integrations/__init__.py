"""The operators under other libraries' names and models."""
