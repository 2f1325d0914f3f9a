-- What the outbox is to those beside it: the application's inserts work under any
-- search_path and any default privileges, and a publication of all tables, which
-- another tool makes, stops no relay.
-- Only up; it can be run twice, and by psql alone.

-- +goose Up

-- A publication of updates or deletes wants every row to have an identity, also of a
-- table that it has only since it has all of them. The history has no key.
-- +goose StatementBegin
alter table outbox_relay_history replica identity full;
-- +goose StatementEnd

-- The trigger calls gen_random_ulid() in the session of whoever inserts, whose
-- search_path may lack the schema, and who may not have been given EXECUTE: default
-- privileges can take it from PUBLIC. A function whose body is none that a release has
-- shipped is left as it is: outbox-relay doctor says what to do about it.
-- +goose StatementBegin
do $do$
declare
    maker oid := (select f.oid
                  from pg_trigger as t
                  join pg_proc as f on f.oid = t.tgfoid
                  where t.tgrelid = 'events'::regclass and not t.tgisinternal
                    and md5(f.prosrc) in ('04ba5730ac67a3caf493dd171db88024', '367ec80511078ceeb7649e28502e2d5f'));
    home  name := (select nspname from pg_namespace join pg_class on relnamespace = pg_namespace.oid
                   where pg_class.oid = 'events'::regclass);
begin
    if maker is not null then
        execute replace(pg_get_functiondef(maker), '|| gen_random_ulid();', format('|| %I.gen_random_ulid();', home));
    end if;
    if exists (select
               from pg_proc
               where oid = to_regprocedure(format('%I.gen_random_ulid()', home)) and pg_has_role(proowner, 'USAGE')
                 and not has_function_privilege('public', oid, 'EXECUTE'))
    then
        execute format('grant execute on function %I.gen_random_ulid() to public', home);
    end if;
end;
$do$;
-- +goose StatementEnd
