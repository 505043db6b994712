"""What a job would do and cost, before it is paid for."""
