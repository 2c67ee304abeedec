# The agent, for a container with three capabilities: see compose.yaml.
# BASE: any Debian 12, such as one that tools/image.sh makes without a registry.
ARG BASE=debian:bookworm-slim
FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        clang llvm gcc libc6-dev linux-libc-dev libbpf-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements.txt requirements-build.txt ./
RUN python3 -m venv /opt/streamer \
    && python3 -m venv /opt/build \
    && /opt/streamer/bin/pip install --no-cache-dir --require-hashes -r requirements.txt \
    && /opt/build/bin/pip install --no-cache-dir --require-hashes -r requirements-build.txt
COPY . .
# The C modules are optional for `pip install`, but not here.
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/streamer/bin/pip install --no-cache-dir --no-deps /wheels/*.whl \
    && cd / && /opt/streamer/bin/python -c 'import streamer.ring._records, streamer.sinks.kafka._record_batch'

# No compiler: the wheel carries the kernel programs and the C modules.
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends libbpf1 python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/streamer /opt/streamer
ENTRYPOINT ["/opt/streamer/bin/streamer"]
CMD ["run"]
