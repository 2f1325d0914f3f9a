# The relay as one static binary: no shell, no package manager, no root.
FROM golang:1.26-alpine AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY . .
ARG VERSION=""
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /outbox-relay .

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /outbox-relay /outbox-relay
USER 65532:65532
ENV OUTBOX_HTTP_ADDR=:8080
EXPOSE 8080
ENTRYPOINT ["/outbox-relay"]
CMD ["run"]
