"""Make the bucket of MLflow's artifacts, unless it is there."""

from __future__ import annotations

import os

import boto3


def main() -> None:
    """Read the bucket and the store's address from the environment, as MLflow does."""
    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    bucket = os.environ["ARTIFACT_BUCKET"]
    if bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)


if __name__ == "__main__":
    main()
