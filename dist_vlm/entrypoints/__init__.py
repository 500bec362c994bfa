"""Commands under the module names that callers of vLLM know."""
