"""What the sender and the receivers of policy weights share: layout of buckets and the fingerprint."""
