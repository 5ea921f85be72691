"""Access: credentials, principals, and the scopes that calls need."""
