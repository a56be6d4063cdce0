# The host: `fastprompt serve` in a container. docs/serving.md says how to run it.
#
#   docker build -t fastprompt .
#   docker build -t fastprompt:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run -p 8000:8000 -v ./runs/birds:/adapters/birds:ro fastprompt --adapter birds=/adapters/birds
#
# TORCH_INDEX is where torch comes from: builds for the CPU, or for a version of CUDA. The CUDA builds bring their own
# CUDA libraries, so that the machine needs only NVIDIA's driver and container toolkit (docker run --gpus all).
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/fastprompt
ENV PATH=/opt/fastprompt/bin:$PATH
RUN pip install --no-cache-dir 'setuptools>=77'
RUN pip install --no-cache-dir --index-url ${TORCH_INDEX} torch torchvision
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE NOTICE ./
COPY csrc csrc
COPY kernels kernels
COPY fastprompt fastprompt
RUN FASTPROMPT_REQUIRE_NATIVE=1 pip install --no-cache-dir --no-build-isolation '.[serve,weights,hf]'

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 1000 host
COPY --from=build /opt/fastprompt /opt/fastprompt
ENV PATH=/opt/fastprompt/bin:$PATH PYTHONUNBUFFERED=1
USER host
WORKDIR /home/host
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fastprompt", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--backbone", "clip-vit-b16"]
