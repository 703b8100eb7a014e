FROM python:3.13.9-slim-trixie

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    VINCACHE_DATABASE=/data/vincache.db

# A user who owns nothing but the volume; the rest of the file system may be mounted read-only.
RUN useradd --system --uid 10001 --home-dir /app --no-create-home vincache && install --directory --owner=vincache /data
VOLUME /data

# A layer of its own: it changes with the pins only.
WORKDIR /app
COPY requirements.txt .
RUN sed '/^# Only the tests/,$d' requirements.txt > /tmp/service.txt \
    && pip install --no-cache-dir --compile -r /tmp/service.txt \
    && rm /tmp/service.txt

COPY main.py schema.sql ./
RUN python -m py_compile main.py

USER vincache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]

# One process per file (README, Operating). In exec form it gets Docker's SIGTERM itself, and is done within Docker's 10 s.
CMD ["uvicorn", "main:app", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "8"]
