"""One call runs a Mixture-of-Experts layer on the fastest backend that this machine allows."""
