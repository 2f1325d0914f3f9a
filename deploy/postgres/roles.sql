-- The roles of an outbox: each with what it needs, and no more. After `outbox-relay
-- migrate`, and in the same database, as who may create roles with REPLICATION:
--
--     psql -f deploy/postgres/roles.sql postgres://admin@db/app
--     psql -c '\password relay' postgres://admin@db/app
--
-- It can be run twice. It is for the table events in the schema public: where yours
-- has another name, or the relay's role is to have one, write these.

do $$
begin
    if not exists (select from pg_catalog.pg_roles where rolname = 'relay') then
        create role relay login replication;
    end if;
    if not exists (select from pg_catalog.pg_roles where rolname = 'outbox_writer') then
        create role outbox_writer nologin;
    end if;
    execute format('grant connect on database %I to relay', current_database());
end;
$$;
grant usage on schema public to relay, outbox_writer;

-- The application: GRANT outbox_writer TO its role. It inserts events and learns
-- their ids; it reads and changes none.
grant insert (aggregate_type, aggregate_id, event_type, payload, headers), select (id) on events to outbox_writer;

-- The relay. Insert, update and delete are on its own tables alone.
grant select, update (status, published_at, failed_at, failed_reasons, failed_attempts) on events to relay;
grant select, insert, update on outbox_relay_checkpoints to relay;
grant select on outbox_relay_secret to relay;
grant execute on function outbox_relay_publication_state(name, regclass), outbox_relay_check_partition_key(regclass) to relay;
grant select, insert, update, delete on outbox_relay_leftovers, outbox_relay_history, outbox_relay_batches, outbox_relay_backlog to relay;

-- Only with OUTBOX_AFTER_PUBLISH=delete, or OUTBOX_RETENTION:
-- grant delete on events to relay;

-- Only with OUTBOX_RETRY_ATTEMPTS, or for `outbox-relay retry` as this role:
-- grant update (retried_at, retried_attempts) on events to relay;

-- Only with OUTBOX_RETRY_ATTEMPTS, or for `outbox-relay retry` and `replay` as this role:
-- grant execute on function outbox_relay_ask(regclass, text), outbox_retry(text[]), outbox_retry_all() to relay;

-- Only with OUTBOX_RETENTION on a partitioned table:
-- grant execute on function outbox_relay_drop_partitions(regclass, interval) to relay;
