"""Room for zero-downtime updates of the agent and its images. Nothing is here yet; see the issues."""
