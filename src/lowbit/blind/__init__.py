"""Two models answer the same prompts, and who judges the answers does not know whose is whose."""
