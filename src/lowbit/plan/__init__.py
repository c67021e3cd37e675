"""Planning: what becomes of every tensor, and every byte that will be written, before any weight is read."""
