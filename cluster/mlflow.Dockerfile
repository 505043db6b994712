# MLflow with PostgreSQL and password protection; see compose.yaml.
FROM python:3.11-slim-bookworm
RUN pip install --no-cache-dir "mlflow[auth]==3.17.2" psycopg2-binary==2.9.11 \
 && useradd --create-home --uid 1000 mlflow \
 && install --directory --owner mlflow /var/lib/mlflow
COPY --chmod=755 mlflow.sh /usr/local/bin/serve
USER mlflow
EXPOSE 5000
CMD ["serve"]
