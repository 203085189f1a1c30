"""What integer layers are given, made of weights once when a program is materialized: codes, scales, dyadic numbers."""
