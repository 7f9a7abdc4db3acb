# docker build -t imagenet1k .
# mkdir -p runs && docker run --gpus all --ipc host --user "$(id -u)" -e HF_TOKEN -v "$PWD/runs:/srv/runs" imagenet1k --dataset imagenet1k --amp
#
# --ipc host: decoding processes hand over batches in shared memory, of which a container has 64 MB. Other programs:
# docker run ... --entrypoint python imagenet1k /app/evaluate.py runs/NAME
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# The compiler is for --compile. torch brings CUDA's libraries along.
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=ghcr.io/astral-sh/uv:0.13 /uv /usr/local/bin/uv

WORKDIR /app
COPY requirements.txt .
RUN uv venv --python /usr/bin/python3 /opt/venv && uv pip install --no-cache --python /opt/venv --compile-bytecode \
    -r requirements.txt
COPY . .

# Any user may run it: what a run writes, and what libraries keep, goes to /srv.
RUN useradd --home-dir /srv --uid 10001 trainer && mkdir -p /srv/runs && chmod -R a+rwX /srv
ENV PATH=/opt/venv/bin:$PATH HOME=/srv NO_ALBUMENTATIONS_UPDATE=1 PYTHONDONTWRITEBYTECODE=1
USER trainer
WORKDIR /srv
ENTRYPOINT ["python", "/app/main.py"]
