# An image for GPU nodes:
#   docker build -t codeparrot-ds .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 -v "$PWD/data:/workspace/data" -v "$PWD/runs:/workspace/runs" \
#     codeparrot-ds codeparrot-ds launch codeparrot-small
# docs/multi-node.md shows several hosts. Directories that are mounted must be writable by UID.

# The toolkit, with which DeepSpeed compiles its operators, must have the major version of torch's CUDA.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS base
# Versions are not pinned: mirrors keep only the newest. Host keys in an image would be known to all.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        bubblewrap g++ iproute2 libaio-dev openssh-client openssh-server pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

FROM base AS environment
WORKDIR /workspace
# First torch, which changes least and is the largest. For another build of it: --build-arg TORCH_INDEX=URL
COPY constraints.txt ./
ARG TORCH_INDEX=https://pypi.org/simple
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --index-url "$TORCH_INDEX" torch
COPY . source
ARG EXTRAS=corpus,wandb
RUN .venv/bin/pip install --no-cache-dir --constraint constraints.txt "./source[$EXTRAS]"

FROM base
LABEL org.opencontainers.image.title="codeparrot-ds" \
      org.opencontainers.image.description="Pre-train GPT-2 code models with DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG UID=10001
# Ubuntu's image has a user with the number that most people have.
RUN if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --create-home --shell /bin/bash --uid "$UID" codeparrot \
    && install --directory --owner codeparrot --group codeparrot /workspace /workspace/data /workspace/runs
COPY docker/entrypoint.sh /usr/local/bin/entrypoint.sh
COPY --from=environment /workspace/.venv /workspace/.venv
ENV PATH=/workspace/.venv/bin:$PATH
USER $UID
WORKDIR /workspace
ENTRYPOINT ["entrypoint.sh"]
CMD ["codeparrot-ds", "--help"]
