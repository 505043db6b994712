#!/bin/sh
# The server's settings, from secret files: passwords stay out of arguments, images and the compose file.
set -eu
umask 077
secret() { cat "${SECRETS:-/run/secrets}/$1"; }
state=${STATE:-/var/lib/mlflow}

settings=$(mktemp)
printf '[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///%s/auth.db\nadmin_username = admin\nadmin_password = %s\n' \
  "$state" "$(secret mlflow_admin)" > "$settings"
export MLFLOW_AUTH_CONFIG_PATH="$settings"
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret mlflow_flask)
export MLFLOW_FLASK_SERVER_SECRET_KEY
: "${MLFLOW_BACKEND_STORE_URI:=postgresql://mlflow:$(secret postgres)@database:5432/mlflow}"
export MLFLOW_BACKEND_STORE_URI

exec mlflow server --app-name basic-auth --artifacts-destination "$state/artifacts" \
  --host "${HOST:-0.0.0.0}" --port "${PORT:-5000}" --workers "${WORKERS:-4}" --allowed-hosts "$ALLOWED_HOSTS"
