"""Speed and memory of the engine against the released code's computation and against TRL. Nothing imports this."""
