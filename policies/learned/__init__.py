"""A cost model fitted to measurements, and the policy that ranks backends by it."""
