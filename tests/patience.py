"""How long tests wait for what has to come: a hang ends there, a busy machine does not."""

PATIENCE_SECONDS = 600.0
