"""Clients of black-box APIs: requests within a budget and a rate limit, each logged before use."""
