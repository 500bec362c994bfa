"""What runs next, and where its keys and values lie. Host-only: imports neither torch nor ray."""
