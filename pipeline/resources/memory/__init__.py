"""Memory: what a process has mapped, which pages to carry, and how to make it again."""
