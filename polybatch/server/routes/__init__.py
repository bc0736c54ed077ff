"""One file per group of endpoints; `polybatch.server.app` puts them together."""
