"""The OpenAI API over HTTP: the engine in a thread of its own, FastAPI and uvicorn around it."""
