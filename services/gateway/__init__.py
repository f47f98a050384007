"""The REST gateway: HTTP in, job records and event streams out."""
