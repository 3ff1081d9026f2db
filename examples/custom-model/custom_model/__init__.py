"""Learn how fast things cool from temperature readings that stay on many sites."""
