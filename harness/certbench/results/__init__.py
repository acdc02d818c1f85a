"""The rows: their columns, their rules, the folder that keeps them, and where they came from. Never imports torch."""
