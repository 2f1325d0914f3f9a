# What the tests need beside Go, they bring: Postgres by npm where the machine
# has none of 15 or newer.

GO ?= go
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
VERSIONS ?= 15 16 17 18

# The packages whose tests depend on the version of Postgres.
INTEGRATION = ./checkpoint ./decoder ./migrations ./outbox ./replication ./relay

.PHONY: test test-versions lint bench build demo

## test: all tests with the race detector, in a few minutes
test:
	$(GO) test -race -timeout 15m ./...

## test-versions: the integration tests on each supported version of Postgres
test-versions: $(addprefix test-version-,$(VERSIONS))

test-version-%:
	POSTGRES_VERSION=$* $(GO) test -count=1 -timeout 15m $(INTEGRATION)

## lint: go vet and staticcheck
lint:
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

## bench: the relay beside pg_recvlogical, on the same backlog
bench:
	$(GO) run ./internal/bench

## demo: the main job on a throw-away Postgres and NATS
demo:
	$(GO) run ./demo

## build: the relay as a static binary
build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w" -o outbox-relay .
