// A consumer in JavaScript: each event in commit order, with its effect once.
// It keeps each event's id in one transaction with what it does, in the table
// inbox of examples/orders/tables.sql. SIGTERM lets it finish what it has begun.
//
//   npm install && DATABASE_URL=postgres://… NATS_URL=nats://… node inbox.mjs
import { AckPolicy, jetstream, jetstreamManager } from '@nats-io/jetstream'
import { connect } from '@nats-io/transport-node'
import pg from 'pg'

const name = 'email'
const db = new pg.Pool({ connectionString: process.env.DATABASE_URL })
const nc = await connect({ servers: process.env.NATS_URL, maxReconnectAttempts: -1 })

const manager = await jetstreamManager(nc)
await manager.consumers.add('EVENTS', {
  durable_name: name,
  filter_subject: 'events.order.placed',
  ack_policy: AckPolicy.Explicit,
  max_ack_pending: 1, // one at a time: in order, however many processes run
})
const consumer = await jetstream(nc).consumers.get('EVENTS', name)
const messages = await consumer.consume({ max_messages: 1 })
process.once('SIGTERM', () => messages.stop())
console.log('consuming')
for await (const msg of messages) await take(msg)
await nc.drain()
await db.end()

// take handles a message and answers it. An answer that is lost lets it come again.
async function take(msg) {
  const id = msg.headers?.get('ce-id')
  try {
    const again = await once(id, msg.json())
    console.log('handled', id, again ? 'again' : '')
    await msg.ackAck()
  } catch (err) {
    console.error('not handled', id, err.message)
    // What can never be handled is not to come again; anything else may pass.
    err instanceof SyntaxError || !id ? msg.term(err.message) : msg.nak(1000)
  }
}

// once does the work for an event and keeps its id, both or neither.
async function once(id, order) {
  const tx = await db.connect()
  try {
    await tx.query('begin')
    const kept = await tx.query('insert into inbox (consumer, event_id) values ($1, $2) on conflict do nothing', [name, id])
    if (kept.rowCount > 0) {
      await tx.query('insert into mails (order_id, recipient, body) values ($1, $2, $3)',
        [order.order, order.customer, `Thank you, ${order.customer}: ${order.quantity} × ${order.product}`])
    }
    await tx.query('commit')
    return kept.rowCount === 0
  } catch (err) {
    await tx.query('rollback')
    throw err
  } finally {
    tx.release()
  }
}
