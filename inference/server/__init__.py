"""The OpenAI API over the runtime. Needs the extra ``serve``; nothing else of planaria imports this package."""
