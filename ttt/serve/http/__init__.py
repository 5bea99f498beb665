"""OpenAI's API over HTTP in front of a `ttt.serve.service.Service`, with what users may do with their own weights."""
