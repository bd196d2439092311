"""Objects that several servers share: in a folder of a shared volume, in S3, or in Google Cloud Storage."""
