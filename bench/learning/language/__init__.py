"""The suite "streams": SmolLM2-135M-Instruct reads streams of text, learns from them, and should keep what it knew."""
