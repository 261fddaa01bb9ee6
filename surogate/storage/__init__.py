"""What is kept in an object store (the S3 API): models, data, checkpoints. Needs the extra `s3`."""
