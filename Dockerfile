# The server's image: `forwardpass-server serve` over /models, for CPUs or, with EXTRA=gpu, for NVIDIA GPUs.
#
#     docker build --tag forwardpass:0.1.0 .
#     docker build --tag forwardpass:0.1.0-gpu --build-arg EXTRA=gpu .
#
# deploy/README.md says how to build with a package index or a certificate authority of your own.

# Any image with glibc and a python3 of version 3.11 that can make a venv. CUDA is in the Python packages and the driver
# is on the host, so the GPU image needs no other base. Use a digest if the tag may change.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS environment
# The extra of the distribution to install: server or gpu.
ARG EXTRA=server
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# All packages and tools are pinned by version and hash. Changes of the sources do not rebuild this layer.
COPY deploy/image/ deploy/image/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv /tools \
    && /tools/bin/pip install --quiet --require-hashes --requirement deploy/image/build.txt \
    && python3 -m venv --without-pip /opt/forwardpass \
    && /tools/bin/pip --python /opt/forwardpass/bin/python install --quiet --require-hashes --no-deps \
        --requirement "deploy/image/${EXTRA}.txt"
COPY pyproject.toml README.md LICENSE ./
COPY protos/ protos/
COPY client/ client/
COPY server/ server/
RUN /tools/bin/pip wheel --quiet --no-deps --no-index --no-build-isolation --wheel-dir /wheels . \
    && /tools/bin/pip --python /opt/forwardpass/bin/python install --quiet --no-deps --no-index /wheels/*.whl \
    && /tools/bin/pip --python /opt/forwardpass/bin/python check
# Headers, a fifth of TensorFlow's size, are for compilers only. TensorFlow requires libclang, but does not use it.
RUN /tools/bin/pip --python /opt/forwardpass/bin/python uninstall --quiet --yes libclang \
    && rm -r /opt/forwardpass/lib/python3.*/site-packages/tensorflow/include \
    && rm -rf /opt/forwardpass/lib/python3.*/site-packages/nvidia/*/include
# The bill of materials of what remains, in CycloneDX format.
RUN PATH=/tools/bin:$PATH cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --mc-type application \
        --output-format JSON --output-file /opt/forwardpass/sbom.cdx.json /opt/forwardpass/bin/python

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="forwardpass" \
      org.opencontainers.image.description="Runs functional models for remote callers, over gRPC." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
COPY --from=environment /opt/forwardpass /opt/forwardpass
# A named volume gets the owner of this folder.
RUN install --directory --owner=65532 --group=65532 /data
# Loopback cannot be reached from outside the container, so the server listens on all addresses and requires TLS, tokens
# or --insecure. It writes to /tmp and /data only, so the root can be read-only.
ENV PATH=/opt/forwardpass/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    FORWARDPASS_HOST=0.0.0.0 \
    FORWARDPASS_METRICS_HOST=0.0.0.0 \
    FORWARDPASS_MODEL_REPOSITORY=/models \
    FORWARDPASS_SESSION_STORE=sqlite:///data/sessions.sqlite3
# A number, so that Kubernetes can check that it is not root. The user has no name and owns only /data.
USER 65532:65532
WORKDIR /data
EXPOSE 8500 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["forwardpass", "health", "127.0.0.1:8500"]
ENTRYPOINT ["forwardpass-server"]
CMD ["serve"]
