"""RMS norm of queries or keys over all heads, then rotary position embedding."""
