"""All that knows vLLM and torch."""
