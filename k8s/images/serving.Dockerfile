# The service, for CPUs. From the repository's root: docker build -f k8s/images/serving.Dockerfile -t rushes/serving:0.1.0-cpu .
FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY k8s/images/constraints.txt /constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY models models
COPY export export
COPY serving serving
RUN python -m venv /opt/rushes \
 && /opt/rushes/bin/pip install -c /constraints.txt '.[postgres,s3,gcs,tracing]'

FROM python:3.11.13-slim-bookworm
RUN groupadd --gid 1000 rushes && useradd --uid 1000 --gid 1000 --home-dir /tmp --no-create-home rushes
COPY --from=build /opt/rushes /opt/rushes
ENV PATH=/opt/rushes/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8080
CMD ["rushes", "serve", "--host", "0.0.0.0"]
