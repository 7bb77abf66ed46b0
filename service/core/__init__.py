"""What the service does, free of web, SQL and runtime libraries."""
