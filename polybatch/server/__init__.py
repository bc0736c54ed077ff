"""An OpenAI-compatible HTTP server in front of `polybatch.engine.async_llm.AsyncLLM`."""
