"""The node agent that outlives workers and owns their checkpoint memory."""
